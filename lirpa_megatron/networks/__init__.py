"""Plain networks that are imported from files (ONNX): description, module, importer."""
