"""The scheduler: who runs next. Its core decides, the rest of the package talks to the mesh."""
