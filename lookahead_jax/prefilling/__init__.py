"""Turns a prompt into a budgeted cache: each layer is attended, scored and cut in turn."""
