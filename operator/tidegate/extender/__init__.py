"""The kube-scheduler extender: decodes, asks `core.place`, encodes.

`gather` keeps one view of every pool by watches, `desk` decides on it and remembers what it
answered, `wake` touches pods that wait, `server` speaks HTTP.
"""
