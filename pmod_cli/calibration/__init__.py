"""Routers and retention ratios without training: measured, fitted in closed form, and held against controls.

`routable` is the model, dense or routed, on one set of weights; `reference` are the dense model's own answers;
`observe` and `fit` make routers; `selection` names what chooses tokens, controls among them; `measure` compares a
choice with the dense model; `schedules` finds retention ratios for a budget. Those know no files. `questions`,
`subject` and `progress` bring and keep data; `calibrate` is the whole.
"""
