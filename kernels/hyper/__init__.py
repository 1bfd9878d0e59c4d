"""hyper_attention, forward, backward and its step."""
