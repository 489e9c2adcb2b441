"""From a configuration to lookahead modules: prompts, the model's responses, training."""
