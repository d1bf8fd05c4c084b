"""Makes p-MoD checkpoints of other checkpoints; costs as much as the routers, not as much as the model.

A conversion in order: `checkpoints.source` opens the checkpoint, `formats` says what it is in transformers' own names,
`plan` adds a schedule and routers, and `convert` has `checkpoints.write` put it all in place in one step. `shapes`
holds every tensor against the model that the config makes, on the meta device: for that alone torch and transformers
are imported, besides pickled files, tokenizers that have to be extended and vision towers of LLaVA's own format.
"""
