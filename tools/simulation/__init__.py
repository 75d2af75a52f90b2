"""Caches of other methods and formats, simulated: attention reads rows that went through a method and back.

``cache.py`` has the interface, ``methods.py`` the list of methods; each other module is one method, from its paper.
"""
