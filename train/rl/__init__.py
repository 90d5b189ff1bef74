"""Learning by reward: groups of sampled answers to one prompt, scored by rules, and the steps that learn from them.

- groups.py: sampled answers, their rewards and advantages; which groups are learned from.
- packing.py: groups to micro-batches of static shape. loss.py: the clipped objective. step.py: a step over them.
- handover.py: trained weights to the engine that samples.
"""
