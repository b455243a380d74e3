"""Where this rank stands among the others, and what it says to them: groups, collectives, random streams."""
