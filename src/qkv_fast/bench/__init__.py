"""How fast it is here, beside other libraries: ``python -m qkv_fast bench``."""
