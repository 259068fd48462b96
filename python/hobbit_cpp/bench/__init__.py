"""Measuring speed side by side, and saying it beforehand.

- contenders: who runs: the table of names, and commands of other programs
- conditions: memory cgroups, the page cache, read-ahead; what is printed beside the figures
- worker: one contender over one text, in a process of its own
- runner: all of them, alternating, and medians
- roof: the bound of a row, and where its time went
- measure: from what was asked to the document
- report: the document that --json writes, and the tables
- sweep: speed and quality over memory: CSV and a picture
- replayed: routing of one model made to fit another
- sizes, routing, forecast, plan: what `hobbit plan` says: from llama.cpp's own sizes, the statistics of real routing, the probes
"""

from __future__ import annotations
