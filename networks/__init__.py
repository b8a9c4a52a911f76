"""The embedding networks: one module a family, `catalogue` for their names, `files` for the files that hold them.

models.py is the door: `build_network` and `network_from_state` are there, and nobody else imports a family. Every
family is a class with

    feeding         how its input is prepared (`catalogue.Feeding`)
    stages          the names of its modules and parameters by stage, from the input on, for `train.py --freeze`
    settings_of     reads from the keys and shapes of a state_dict which one it is, or that it is none of this family

and is built with `embedding_size`, `recompute` and the settings of its entry in the catalogue. Parameters are
registered in the order, and under the names, of the public code, so that public checkpoints load as they are and what
is trained here loads there. docs/networks.md says how to add one.
"""
