"""Evaluation through lmms-eval's own evaluator, in process, for dense and p-MoD checkpoints alike.

- ``lmms``: the entry point that lmms-eval finds (``--model pmod``); ``adapter``: the model behind it.
- ``batching``: answers in sorted batches of the right size.
- ``catalogue``: lmms-eval's tasks; ``harness``: one pass over one of them through its evaluator.
- ``run``: a whole evaluation; ``runner``: its work; ``settings``: how; ``processes``: with how many.
- ``folder``, ``store``: what is kept on the disk; ``results``: what comes out; ``report``: how it is shown.
- ``metrics``: which of a task's numbers is its score; ``paper``: the paper's two tables; ``stats``: how sure we are.
- ``preflight``: what is missing, found before a model is loaded; ``identity``: what was evaluated, with what.
- ``diff``: two evaluations sample by sample; ``gates``: limits for CI.
- ``tasks``: local question-and-answer data as an lmms-eval task.
"""
