"""The p-MoD mechanism, one idea a file; nothing here imports the command line or touches files.

- ``schedule``: how many vision tokens each layer keeps (progressive ratio decay).
- ``router``: the router, its weight normalisation, and the choice of tokens.
- ``plan``: what one forward pass knows of its tokens, found with one host synchronisation.
- ``layer``: the Mixture-of-Depths decoder layer with symmetric token reweighting.
- ``cache``: the KV cache that holds only kept tokens.
- ``decoders``: a language model with such layers, which plans each forward pass before it runs.
- ``model``, ``family``: what turns a transformers image-text-to-text class into its p-MoD counterpart.
"""
