"""The contract of StageMesh: .proto files of package stagemesh.v1 and the stubs made from them.

`make protos` makes the stubs anew; a test compares them with the committed ones.
"""
