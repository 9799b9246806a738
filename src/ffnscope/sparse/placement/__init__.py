"""Hot channels on the fast device, cold ones on the other: frequencies, planner, prediction, FFNs in two parts."""
