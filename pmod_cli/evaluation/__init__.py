"""Evaluation through lmms-eval's own evaluator, in process, for dense and p-MoD checkpoints alike.

- ``lmms``: the entry point that lmms-eval finds (``--model pmod``); ``adapter``: the model behind it.
- ``batching``: answers in sorted batches of the right size.
- ``catalogue``: lmms-eval's tasks; ``harness``: one pass over one of them; ``patches``: changes to lmms-eval.
- ``requirements``: what is missing, found before a model is loaded; ``evaluate``: a whole evaluation.
- ``folder``: what is kept on the disk; ``identity``: what was evaluated, with what.
- ``metrics``: which of a task's numbers is its score; ``stats``: how sure we are; ``paper``: the paper's tables.
- ``results``: what comes out; ``tables``: how it is shown; ``diff``: two evaluations sample by sample.
- ``options``, ``command``: all of ``pmod eval``.
- ``tasks``: local question-and-answer data as an lmms-eval task.
"""
