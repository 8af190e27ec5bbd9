"""In: a live module or a traced program, with example inputs. Out: a frozen `Capture` of one or more graphs."""
