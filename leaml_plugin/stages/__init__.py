"""The stages of LEAML, in the order in which the pipeline runs them.

========================  ======================================================  ==========================
stage                     reads                                                   writes
========================  ======================================================  ==========================
``caption`` (option)      a teacher, unlabelled pictures                          captions, pictures with them
``relevance``             base model, labelled questions                          neuron scores, selection
``train_generator``       base model, labels, captions, selection                 the QA generator
``generate``              QA generator, unlabelled pictures                       pseudo-QA shards
``verify`` (option)       QA generator, pseudo-QA shards                          shards with second answers
``filter``                pseudo-QA shards                                        kept pairs, dropped pairs
``finetune``              base model, labels, kept pairs                          the adapted VQA model
``evaluate``              any model, questions with answers                       predictions, metrics
========================  ======================================================  ==========================

A stage is a config dataclass and a ``run`` function. It takes its inputs as arguments, writes into the
:class:`~leaml_plugin.artifacts.StageDirectory` it is given, returns what it wrote, and does nothing but read where
that directory is complete already. Stages never import each other.
"""
