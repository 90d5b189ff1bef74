"""Learning by reward: groups of sampled answers to one prompt, scored by rules, and the steps that learn from them.

- config.py: the tables `[rl]`, `[rl.sampling]`, `[rl.curriculum]` and `[rl.verifiers]` of a job file.
- problems.py: rows of data files -> `Problem`, a prompt and its reference. levels.py: how hard each was for a model,
  which measure.py measures.
- verifiers.py: (text, reference) -> `Reward`, by domain; rules.py and actions.py have what each kind compares.
  self_test.py refuses weak ones before a job starts. judging.py scores many texts, those that may take long in
  processes that it can kill (second_opinion.py).
- curriculum.py: which problems a step draws.
- groups.py: sampled answers, their rewards and advantages; which groups are learned from.
- packing.py: groups to micro-batches of static shape. loss.py: the clipped objective. step.py: a step over them.
- rollouts.py: answers from the engine. handover.py: trained weights to it. cycle.py: all of that, step by step.
- loop.py: a job from its file to its result. log.py: what it writes about its steps.
"""
