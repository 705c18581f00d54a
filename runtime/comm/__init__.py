"""Communications: what is asked for, the drivers that answer, where a rank stands."""
