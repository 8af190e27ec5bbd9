"""In: a live module or a graph, with example inputs. Out: a frozen `Capture` of one or more graphs."""
