"""`vql evaluate`: models trained alike on one data set, and what each is worth and costs."""
