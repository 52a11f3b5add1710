"""LLM-EvRep: images of events that a frozen language model reads as it reads photographs."""
