"""Layers with an adapter as they are computed in training: LoRA, DoRA, LoKr, LoHa.

PEFT makes the adapter, names its weights and merges them; what is computed is written here.
"""
