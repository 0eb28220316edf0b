"""openrl_reason: train language models to reason, by online and offline reinforcement learning on Ray."""

__version__ = "0.1.0"
