"""The pieces alone: a step that is written by hand. `python examples/by_hand.py [EPOCHS]`

For research on the step itself. `Distiller` computes the same method faster, and remembers what is easy to forget: that
rank-one factors learn at E times the rate, and decay towards 1.
"""

import itertools
import random
import sys

import torch
from digits import accuracy, digits, small_network, trained
from torch.utils.data import DataLoader

import ensdistill

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
E = 3
train, test = digits()
teachers = [trained(small_network(seed), train, epochs) for seed in range(E)]
student = ensdistill.to_batch_ensemble(small_network(seed=E), members=E)
ensdistill.check_members(student, train.tensors[0][:4])  # every member is a network of its own

factors = [p for name, p in student.named_parameters() if name.endswith(("rho_r", "rho_s"))]
weights = [p for name, p in student.named_parameters() if not name.endswith(("rho_r", "rho_s"))]
optimizer = torch.optim.SGD(
    [{"params": weights, "weight_decay": 5e-4}, {"params": factors, "lr": 0.05 * E, "weight_decay": 5e-4 / E}],
    lr=0.05,
    momentum=0.9,
    nesterov=True,
)
pairs = list(itertools.permutations(range(E), 2))
for epoch in range(epochs):
    for images, labels in DataLoader(train, batch_size=50, shuffle=True, drop_last=True):
        shown = ensdistill.perturbed(images, teachers, student, pair=random.choice(pairs))
        with torch.no_grad():
            teacher_logits = torch.stack([teacher(shown) for teacher in teachers])
        student.train()
        student_logits = student(torch.cat([shown] * E)).unflatten(0, (E, -1))  # blockwise, member by member
        loss = ensdistill.distillation_loss(student_logits, teacher_logits, labels, tau=4.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

print(f"student: {accuracy(ensdistill.average_members(student), test):.3f} of the test images")
