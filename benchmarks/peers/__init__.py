"""StageMesh beside what a user would take instead: the same model, machine, threads and prompts.

    python -m benchmarks.peers --peers transformers,openvino,ctranslate2,llama_cpp

Each peer is a script with one command line (`protocol`), in an environment of its own.
"""
