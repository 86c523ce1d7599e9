"""`python -m benchmarks`: the speed of meshes of the demo model."""

from benchmarks.mesh_speed import main

if __name__ == "__main__":
    main()
