"""A black-box suite for endpoint pickers: plays the proxy's side of ext_proc and names each rule it checks.

It knows nothing of Tidegate's own picker. What is checked are the rules of the Endpoint Picker
Protocol (proposal 004 of the Gateway API Inference Extension) and of Envoy's external processing.
"""
