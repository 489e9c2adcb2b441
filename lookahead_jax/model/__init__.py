"""The transformer itself: configuration, parameters, sharding, cache and the one block forward."""
