"""The command line: the only room that prints. `app` names the commands and their options; the
other modules do what they say.
"""
