"""What p-MoD saves, counted and measured.

- ``geometry``: the sizes of a model that counting needs, read from its config.
- ``prompt``: how many vision tokens and crops an image becomes.
- ``closed_form``: multiply-adds, KV cache, parameters and memory traffic by formula (no torch).
- ``fvcore_counter``: the same multiply-adds counted from the real model, on the meta device.
- ``latency`` (and ``placement``): real prefill, decode and end-to-end time, the KV cache's real bytes.
- ``subject``: finds the model that a user names. ``profile``: puts it all together into one JSON object.
- ``command``: what ``pmod profile`` does with its ``options``; ``render`` and ``plots`` show the result.

Nothing is imported here: counting by formula must not load torch, and measuring must not need fvcore.
"""
