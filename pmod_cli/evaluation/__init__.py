"""Evaluation through lmms-eval's own evaluator, in process, for dense and p-MoD checkpoints alike.

- ``lmms``: the entry point that lmms-eval finds (``--model pmod``); ``adapter``: the model behind it.
- ``batching``: answers in sorted batches of the right size.
- ``harness``: everything that touches lmms-eval's tasks and evaluator.
- ``run``: a whole evaluation; ``store``: what it has answered so far; ``results``: what comes out.
- ``metrics``: which of a task's numbers is its score; ``paper``: the paper's two tables; ``stats``: how sure we are.
- ``preflight``: what is missing, found before a model is loaded.
- ``tasks``: local question-and-answer data as an lmms-eval task.
"""
