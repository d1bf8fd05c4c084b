"""Makes p-MoD checkpoints of other checkpoints; costs as much as the routers, not as much as the model.

The way of a conversion: `source` finds the checkpoint, a module of `formats` says what it is in transformers' own
names, `convert` adds a schedule and routers, and `write` puts it all beside its place and moves it there. Nothing here
imports torch or transformers, except where a pickled file, or a tokenizer that has to be extended, needs it.
"""
