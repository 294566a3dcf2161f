"""Scenes, the rendered world: one to four coloured shapes on a background, with captions.

    spec               what a scene is, and scene number i of an endless list
    render             a scene -> its picture, whole or a window of it, at any resolution
    captions           a scene -> a caption, and the facts that the caption asserts
    dataset            ScenesData: scenes as training data, rendered on the fly
    make, tfds_builder scenes -> a TensorFlow Datasets dataset on disk
    reading            a picture -> the objects and the background that it shows
    judge              a picture and a caption's facts -> which facts the picture shows
    text_pretraining   captions -> a small T5 encoder that knows their words

Importing the package loads none of these.
"""
