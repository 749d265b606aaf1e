"""Names under which settings of rewards are hashed.

A hash in an evaluation says which reward gave its numbers. It must not change when a setting is
renamed, so every renamed setting keeps its first name here.
"""

FIRST_NAMES = {"score_from": "readout"}
