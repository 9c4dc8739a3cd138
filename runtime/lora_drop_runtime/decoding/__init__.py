"""Requests: sessions, their steps and caches, sampling."""
