"""Steering for the routers of other frameworks: ``tamoe.adapters.transformers.steer(model, plan)``.

Each module adapts one framework and imports it when :func:`steer` is called. ``python -m
tamoe.adapters`` lists what is installed and what is supported.
"""
