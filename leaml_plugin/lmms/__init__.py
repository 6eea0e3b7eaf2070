"""The lmms-eval plugin: tasks, the model, data preparation and evaluation with an exit code.

``entry``      registers the model and the tasks with lmms-eval; imports nothing heavy
``model``      the model ``leaml``: any image-text-to-text model with a chat template, with or without an adapter
``endoscopy``  what the tasks on the Kvasir-VQA schema share with ``leaml data endoscopy``
``sports``     what the tasks on the SPORTU schema share with ``leaml data sports``
``sportr``     SportR's pictures, where the user has access
``scoring``    metrics as lmms-eval aggregates them
``prepare``    ``leaml data``: a labelled part, unlabelled pictures and a test part from a data set
``run``        ``leaml eval`` and ``leaml tasks``

The task files themselves lie in the top-level ``tasks/`` and are installed as ``leaml_plugin.tasks``.
Importing this package imports none of these.
"""
