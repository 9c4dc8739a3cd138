"""Tests; `oracle`, `models` and `golden` are shared by them."""
