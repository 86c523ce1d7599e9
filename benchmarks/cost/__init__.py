"""What the mesh costs beside its stages: the same stages in one process, and as a mesh, in turn."""
