"""Callbacks for other people's trainers: each save is verified, old ones go by rule, damage is not resumed.

    transformers   VerifySaves(), a TrainerCallback
    lightning      VerifySaves(), a Callback
    mmengine       VerifySavesHook, registered: dict(type="VerifySavesHook")
    deepspeed      Saves(folder).save(engine, tag) and .load(engine), for plain loops

    guard          what they share
    background     the process that reads every byte, at low priority

Nothing else in ckpttools imports this package; each of the four imports its own framework and no other.
"""
