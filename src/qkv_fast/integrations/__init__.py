"""Adapters to other libraries, a module for each; only it imports that library, when it is used."""
