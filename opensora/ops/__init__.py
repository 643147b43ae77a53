"""Hold one file per op; import ops from `opensora.functional`.

Nothing is re-exported here: a function under its module's name would hide the module.
"""
