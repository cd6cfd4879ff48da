"""The learner's contenders in `fedsim bench`: every engine, a plain PEFT loop, and one big batch."""
