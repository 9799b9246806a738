"""Predictors of the contribution of every channel to a token, from the input of the FFN."""
