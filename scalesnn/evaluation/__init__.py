"""What a trained net is worth: its accuracy over T, its answers, its synaptic operations and energy."""

__all__: list[str] = []
