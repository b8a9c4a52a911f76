"""Speed, and trials of accuracy, each against a named alternative in the same run.

Every module is a script; `trials` holds what trainings that are compared with each other have in common.
"""
