"""The models of the zoo beside their peers on one machine: time, memory and cost, as ratios.

``tools/benchmark.py`` runs it. A group is a set of models that are compared; it is measured by a
process of its own (:mod:`worker`), in which the models take turns (:mod:`turns`). The parent
(:mod:`runner`) keeps what every process has found, whatever becomes of it, and :mod:`report` makes
the tables.
"""
