"""From a caller's arguments to a `Problem`, in stages, each argument passed once.

    p = Problem()
    dense(p, query, key, value, ...)     tensors.py: layout and element types
    scoring(p, ...)                      scoring.py: masks, positions, modifiers
    output(p, ...)                       output.py: where the answer goes

Each stage checks what it is given and reads from `p` what the stages before it have set. Every
refusal of the library is raised here, before any work, whichever engine will compute.
"""
