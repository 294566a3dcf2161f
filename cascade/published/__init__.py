"""Public weights in other projects' layouts, as stages and networks of ours."""
