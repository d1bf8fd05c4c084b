"""Makes p-MoD checkpoints of other checkpoints; costs as much as the routers, not as much as the model.

A conversion in order: `checkpoints.source` opens the checkpoint, `formats` says what it is in transformers' own names,
`plan` adds a schedule and routers, and `convert` has `checkpoints.write` put it all in place in one step. Nothing here
imports torch or transformers, except where a pickled file, a tokenizer that has to be extended or a vision tower of
LLaVA's own format needs it.
"""
